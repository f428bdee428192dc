"""The calls of gcloud that a launch makes, as argument lists: nothing else of Google Cloud is used.

NAME is the run's name, and the id of both its queued resource and its node. Every call ends in `--quiet`, and in
`--project=PROJECT` except the first. Standard input is empty unless said. Calls with `--format=json` print JSON on stdout; of
others the exit status counts, and of `ssh` the output is passed on. Errors come as `ERROR: (gcloud.…) TEXT` on stderr with a
status that is not 0; `gcloud.py` classifies TEXT.

Account and project (an empty or missing `core.account` means that nobody is logged in):

    gcloud config list --format=json

Before (the three in the middle for each zone; quotas for each quota id; the last only for a gs:// bucket):

    gcloud compute tpus accelerator-types describe TYPE --zone=ZONE --format=json           NOT_FOUND: not in that zone
    gcloud compute tpus tpu-vm versions describe VERSION --zone=ZONE --format=json          NOT_FOUND: not in that zone
    gcloud compute tpus queued-resources describe NAME --zone=ZONE --format=json            NOT_FOUND: the name is free
    gcloud beta quotas info describe QUOTA_ID --service=tpu.googleapis.com --format=json    `dimensionsInfos`
    gcloud storage buckets describe gs://BUCKET --format=json                               `location`, as US-WEST4 or US

A slice (`--provisioning-model` is in alpha only; `describe` has `state.state`, and `state.failedData.error` if it FAILED):

    gcloud compute tpus queued-resources create NAME --node-id=NAME --zone=ZONE --accelerator-type=TYPE
        --runtime-version=VERSION --labels=pretrain-xla=NAME --valid-until-duration=SECONDSs
        [--spot | --reserved] [--internal-ips] [--service-account=ACCOUNT] [--network=NETWORK] [--subnetwork=SUBNETWORK]
    gcloud alpha compute tpus queued-resources create … --provisioning-model=flex-start --max-run-duration=SECONDSs
    gcloud compute tpus queued-resources describe NAME --zone=ZONE --format=json
    gcloud compute tpus tpu-vm describe NAME --zone=ZONE --format=json                      `state`, `networkEndpoints`
    gcloud compute tpus queued-resources delete NAME --zone=ZONE --force                    waits until it is gone
    gcloud compute tpus tpu-vm delete NAME --zone=ZONE                                      only if the node is left over
    gcloud compute tpus queued-resources list --zone=ZONE --format=json                     the sweep: `name` ends in /NAME
    gcloud compute tpus tpu-vm list --zone=ZONE --format=json                               the sweep: `name` ends in /NAME

Workers, one call for each worker I, several at a time. COMMAND is `bash -c '…'` in the worker's home, with all paths below
`$HOME/NAME`; what it needs from us comes by standard input:

    gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=I --strict-host-key-checking=no [--internal-ip]
        --ssh-flag=-oServerAliveInterval=15 --ssh-flag=-oServerAliveCountMax=4 --ssh-flag=-oConnectTimeout=30
        --command=COMMAND

| COMMAND                                   | stdin                | stdout                                                    |
|-------------------------------------------|----------------------|-----------------------------------------------------------|
| unpack the code into `NAME/code`          | a .tar.gz            |                                                           |
| `bash NAME/code/…/on_worker/setup.sh NAME`|                      | one line of JSON: the versions that are installed         |
| `bash …/on_worker/start.sh NAME`          | a JSON object: the   | `started` or `running`                                    |
|                                           | secrets, the command |                                                           |
| `NAME/venv/bin/python …/on_worker/follow.py` …      |            | lines of JSON, for up to `Timing.follow` seconds          |
| `… …/on_worker/stacks.py`, `… …/on_worker/stop.py`  |            | text                                                      |

`ssh` for `launch ssh NAME` has no `--command`, and the user's terminal.

The bucket (PATH is what `--bucket` names; for another URL or a folder that all workers mount, fsspec is used and not gcloud):

    gcloud storage cat gs://PATH/FILE                                                        a missing file: status not 0
    gcloud storage cp - gs://PATH/FILE                                                       standard input is the file
    gcloud storage rsync gs://PATH/FOLDER FOLDER --recursive
"""
