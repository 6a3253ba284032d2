"""From one checkpoint to answers: files, services, sticks; and whether what comes in looks like what was learned."""
