"""A checkpoint folder becomes a file that a stock runtime loads."""
