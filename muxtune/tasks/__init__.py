"""Tasks of tenants: what they ask for, their data, and its tokens."""
