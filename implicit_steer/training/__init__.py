"""What training runs share: Lightning modules, folders of runs, several processes, pictures."""
