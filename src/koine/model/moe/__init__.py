"""Mixture-of-experts layers: routers, experts, losses."""
