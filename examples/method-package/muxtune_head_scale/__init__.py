"""A learned scale per attention head: a PEFT method for muxtune."""
