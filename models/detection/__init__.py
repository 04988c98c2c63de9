"""Detectors: points of a sweep in, boxes out; a backbone by name between pillars and a centre head."""
