"""Caches for other libraries. Each is imported by its own name; nothing else of the package imports one."""
