#!/bin/sh
# Back up the databases and buckets into a folder with the time in its name, and print it.
#
# BACKUP is the folder for all backups; DATABASES and BUCKETS are names. pg_dump reads where the server is from PGHOST,
# PGUSER and PGPASSWORD, rclone from RCLONE_CONFIG_STORE_*.
set -eu
folder="$BACKUP/$(date -u +%Y-%m-%dT%H%M%SZ)"
mkdir -p "$folder.incomplete/databases" "$folder.incomplete/buckets"
# The databases first: files are written before the runs that name them, and are not changed later.
for database in $DATABASES; do
    pg_dump --format=custom --file="$folder.incomplete/databases/$database.dump" "$database"
done
for bucket in $BUCKETS; do
    mkdir -p "$folder.incomplete/buckets/$bucket"
    rclone sync --checksum "store:$bucket" "$folder.incomplete/buckets/$bucket"
done
mv "$folder.incomplete" "$folder"
echo "$folder"
