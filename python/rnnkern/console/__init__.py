"""What the commands share: errors of one line, option types, files, and what the machine is."""
