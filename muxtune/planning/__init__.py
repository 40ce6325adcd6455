"""Planning: from tasks and costs to complete plans (docs/design.md, sections 8 and 10)."""
