"""Full disks, kills and races: every command that writes files is made to fail at each of its writes."""
