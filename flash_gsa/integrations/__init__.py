"""The operator inside other people's code, one module a package. Nothing here is imported by the rest of flash_gsa."""
