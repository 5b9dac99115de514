"""Devices, meshes, sharding and processes."""
