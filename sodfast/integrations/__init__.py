"""Other people's trainers, with this project's schedules and losses."""
