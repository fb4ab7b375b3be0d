"""Devices, threads and transfers between host and device."""
