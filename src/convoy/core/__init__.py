"""The ground that all packages stand on: settings, errors, checksums."""
