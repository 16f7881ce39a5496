"""The durable memory of a shard."""
