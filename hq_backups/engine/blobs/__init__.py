"""What the store of blobs is made of."""
