"""Ranks that talk: the mesh, its teams, transport between stages, and sharding inside them."""
