"""The crash laboratory: kills, failing calls, links, two writers, a hostile server and damaged files (docs/explanation/faults.md)."""
