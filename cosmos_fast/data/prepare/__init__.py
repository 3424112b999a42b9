"""From published caption tables and downloaded images to shards.

Reading order: tables (rows of CSV and parquet files) -> texts (captions of a row, as sentences) -> layouts (the json
member of a sample) -> store (rows found by URL or key) -> downloads (images as img2dataset leaves them) -> shard (one
shard written aside and renamed) -> run (all of it, restartable).
"""
