"""Search by processes on several machines, which Ray starts, places, watches and starts again."""
