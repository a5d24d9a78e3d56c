"""What all packages use: settings, errors, checksums and names of files."""
