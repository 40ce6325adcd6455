"""PEFT methods beside a frozen linear."""
