"""Device and core descriptions in YAML; every number carries its source."""
