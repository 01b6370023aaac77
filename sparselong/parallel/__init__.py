"""One sequence over several processes: mesh, sequence shards, attention across them, one loss."""
