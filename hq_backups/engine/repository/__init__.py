"""Where artifacts lie: a local directory, a bucket."""
