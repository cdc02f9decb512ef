"""Features judged beside the exact kernel that they stand for (SPEC F6): what is measured, kept and shown."""
