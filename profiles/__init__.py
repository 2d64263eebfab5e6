"""Device profiles: one TOML a device, every number with its source."""
