"""CouchDB's files, shard maps and nodes, as the couch store needs them."""
