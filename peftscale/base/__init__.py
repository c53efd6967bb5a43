"""The frozen base: packed, sharded, loaded, and passed through. Nothing in here is ever trained."""
