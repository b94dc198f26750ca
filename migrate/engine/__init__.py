"""Process engines: freeze, dump, restore held, release and kill a process's CPU side."""
