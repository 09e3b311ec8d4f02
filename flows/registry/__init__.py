"""The registry of decisions, and what people ask of it: audit, rollback, lineage, reproduction."""
