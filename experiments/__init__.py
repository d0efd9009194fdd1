"""Measurements and their committed results."""
