"""Tools without a domain: errors, files, tables, registries, processes."""
