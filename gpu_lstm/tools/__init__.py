"""What users do with the modules, besides calling them."""
