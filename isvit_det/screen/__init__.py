"""What a command shows of its work; a log file keeps the rest."""
