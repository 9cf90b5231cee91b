"""Reading and writing character clips and their shards."""
