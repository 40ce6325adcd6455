"""Planning: from tasks and costs to complete plans (DESIGN: hierarchical co-scheduling)."""
