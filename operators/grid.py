"""A bird's-eye-view map: what `voxelize` makes of a sweep. It lives beside its codec."""

from __future__ import annotations

from stepstream.connectors.bev_grids import Grid

__all__ = ["Grid"]
