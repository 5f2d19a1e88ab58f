"""The whole service of a team: its servers kept up, its worker, its schedules."""
