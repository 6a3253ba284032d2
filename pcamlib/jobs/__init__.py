"""Jobs: notebooks executed headlessly."""
