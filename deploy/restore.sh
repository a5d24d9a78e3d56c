#!/bin/sh
# Restore the newest backup of backup.sh, or that in the folder given, into empty databases.
set -eu
folder="${1:-$(find "$BACKUP" -mindepth 1 -maxdepth 1 -type d ! -name '*.incomplete' | sort | tail -n 1)}"
test -d "$folder/databases" || { echo "restore: there is no backup in ${1:-$BACKUP}" >&2; exit 1; }
for database in $DATABASES; do
    createdb "$database" 2>/dev/null || true
    tables=$(psql --no-align --tuples-only --command="SELECT count(*) FROM pg_tables WHERE schemaname = 'public'" "$database")
    test "$tables" -eq 0 || { echo "restore: the database $database is not empty: drop it first" >&2; exit 1; }
done
# The files first, so that no run names one that is missing.
for bucket in $BUCKETS; do
    rclone mkdir "store:$bucket"
    rclone copy --checksum "$folder/buckets/$bucket" "store:$bucket"
done
for database in $DATABASES; do
    pg_restore --no-owner --exit-on-error --single-transaction --dbname="$database" "$folder/databases/$database.dump"
done
echo "restored $folder"
