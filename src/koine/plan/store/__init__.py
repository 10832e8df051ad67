"""Store artifacts: publish, fingerprints, lineage."""
