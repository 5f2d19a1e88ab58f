#!/bin/sh
# Make the secrets that compose.yaml reads, each in a file of its own; those there stay.
set -eu
cd "$(dirname "$0")"
# The folder is closed to others. The files are not: containers run as another user, who
# sees the one file that is given to them.
mkdir -p secrets
chmod 700 secrets
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
keep() { [ -e "secrets/$1" ] || printf '%s' "$2" > "secrets/$1"; }
keep postgres_password "$(random)"
keep s3_access_key "handsigns-$(random | cut -c1-12)"
keep s3_secret_key "$(random)"
keep prefect_login "admin:$(random)"
keep mlflow_password "$(random)"
keep mlflow_secret_key "$(random)"
keep serve_token "$(random)"
keep notify_urls ''
