"""Planning: from tasks and costs to complete plans (docs/planning.md)."""
