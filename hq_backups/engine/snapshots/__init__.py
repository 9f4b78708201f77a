"""The verbs on stores whose servers make and keep their backups themselves: ours to conduct and to prove."""
