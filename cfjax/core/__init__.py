"""L0: named trees, precision, sharding, errors, files."""
