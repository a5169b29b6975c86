//! The store alone: compare-and-swap, history, compaction, and what a kill, a full disk or a damaged file leave.

use super::*;
use serde_json::json;
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write as _};
use std::process::{Command, Stdio};

/// Folder that the child of [`acknowledged_writes_survive_kill_9`] writes to.
const CHILD_DIR: &str = "SKERRY_STORE_TEST_DIR";

fn open(dir: &Path) -> Store {
    Store::open(dir, Durability::Relaxed, Arc::new(Hub::new())).unwrap()
}

fn key(name: &str) -> Key {
    Key { group: "".into(), resource: "things".into(), namespace: "a".into(), name: name.into() }
}

async fn put(store: &Store, name: &str, seen: Option<Arc<Value>>, value: Value) -> Arc<Value> {
    let object = Some(json!({"metadata": {"name": name, "uid": name}, "value": value}));
    store.write(Write { key: key(name), seen, object, expires: None }).await.unwrap()
}

async fn remove(store: &Store, name: &str, seen: Arc<Value>) {
    let write = Write { key: key(name), seen: Some(seen), object: None, expires: None };
    store.write(write).await.unwrap();
}

fn range() -> Range {
    Range::all("".into(), "things".into(), None)
}

/// Names and values at a revision.
async fn at(store: &Store, revision: i64) -> Vec<(String, Value)> {
    let listing = store.list(Range { at: Some(revision), ..range() }, |_| true).await.unwrap();
    let named = |object: &Value| {
        (object["metadata"]["name"].as_str().unwrap().to_owned(), object["value"].clone())
    };
    listing.items.iter().map(named).collect()
}

async fn changes(store: &Store, after: i64) -> Result<Vec<(String, Op)>, StoreError> {
    let replay = store.replay("".into(), "things".into(), None, after).await?;
    Ok(replay.events.into_iter().map(|event| (event.key.name, event.op)).collect())
}

#[tokio::test]
async fn write_on_a_stale_state_is_a_conflict_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let first = put(&store, "x", None, json!(1)).await;
    put(&store, "x", Some(first.clone()), json!(2)).await;
    let object = Some(json!({"metadata": {"name": "x"}, "value": 3}));
    let stale = Write { key: key("x"), seen: Some(first), object: object.clone(), expires: None };
    assert!(matches!(store.write(stale).await, Err(StoreError::Conflict { exists: true })));
    let again = Write { key: key("x"), seen: None, object, expires: None };
    assert!(matches!(store.write(again).await, Err(StoreError::Conflict { exists: true })));
    let found = store.get(&key("x")).await.unwrap().unwrap();
    assert_eq!((found["value"].as_i64(), revision_of(&found)), (Some(2), Some(store.current())));
    store.close().await;
}

#[tokio::test]
async fn every_kept_revision_can_be_read_in_full() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let x1 = put(&store, "x", None, json!(1)).await;
    let y1 = put(&store, "y", None, json!(1)).await;
    let early = store.current();
    let x2 = put(&store, "x", Some(x1), json!(2)).await;
    remove(&store, "y", y1).await;
    put(&store, "z", None, json!(1)).await;
    let middle = store.current();
    remove(&store, "x", x2).await;
    put(&store, "y", None, json!(7)).await;

    let entry = |name: &str, value: i64| (name.to_owned(), json!(value));
    assert_eq!(at(&store, early).await, [entry("x", 1), entry("y", 1)]);
    assert_eq!(at(&store, middle).await, [entry("x", 2), entry("z", 1)]);
    assert_eq!(at(&store, store.current()).await, [entry("y", 7), entry("z", 1)]);
    store.close().await;
}

#[tokio::test]
async fn state_from_before_the_compaction_comes_back_when_it_changes() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let x = put(&store, "x", None, json!(1)).await;
    let y = put(&store, "y", None, json!(1)).await;
    let floor = store.compact_to(store.current()).await.unwrap();
    put(&store, "x", Some(x), json!(2)).await;
    remove(&store, "y", y).await;

    assert_eq!(at(&store, floor).await, [("x".to_owned(), json!(1)), ("y".to_owned(), json!(1))]);
    let replay = store.replay("".into(), "things".into(), None, floor).await.unwrap();
    let before: Vec<_> =
        replay.events.iter().map(|event| event.before.as_ref().unwrap()["value"].clone()).collect();
    assert_eq!(before, [json!(1), json!(1)]);

    let early = changes(&store, floor - 1).await;
    assert!(matches!(early, Err(StoreError::Compacted { .. })), "{early:?}");
    store.close().await;
    drop(store);
    let store = open(dir.path());
    assert_eq!(
        changes(&store, floor).await.unwrap(),
        [("x".to_owned(), Op::Put), ("y".to_owned(), Op::Delete)]
    );
    assert!(matches!(changes(&store, 1).await, Err(StoreError::Compacted { .. })));
    store.close().await;
}

#[tokio::test]
async fn history_of_leases_is_forgotten_before_that_of_other_resources() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let start = Instant::now();
    store.compact(start).await.unwrap();
    let lease = |n: i64| Write {
        key: Key {
            group: "coordination.k8s.io".into(),
            resource: "leases".into(),
            namespace: "a".into(),
            name: format!("l{n}"),
        },
        seen: None,
        object: Some(json!({"metadata": {"name": format!("l{n}")}})),
        expires: None,
    };
    let before = store.current();
    store.write(lease(1)).await.unwrap();
    put(&store, "x", None, json!(1)).await;
    store.compact(start).await.unwrap();
    store.compact(start + CHURN_KEPT).await.unwrap();

    let leases = store.replay("coordination.k8s.io".into(), "leases".into(), None, before).await;
    assert!(matches!(leases, Err(StoreError::Compacted { .. })), "{leases:?}");
    assert_eq!(changes(&store, before).await.unwrap().len(), 1);
    store.compact(start + HISTORY_KEPT).await.unwrap();
    assert!(matches!(changes(&store, before).await, Err(StoreError::Compacted { .. })));
    store.close().await;
}

#[tokio::test]
async fn pages_follow_each_other_without_gap() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for n in 0..10 {
        put(&store, &format!("n{n}"), None, json!(n % 2)).await;
    }
    let mut seen = Vec::new();
    let mut next = None;
    loop {
        let range = Range { limit: Some(2), after: next, ..range() };
        let page = store.list(range, |object| object["value"] == 0).await.unwrap();
        seen.extend(page.items.iter().map(|one| one["metadata"]["name"].clone()));
        next = page.next;
        if next.is_none() {
            break;
        }
    }
    assert_eq!(seen, ["n0", "n2", "n4", "n6", "n8"]);
    store.close().await;
}

#[tokio::test]
async fn many_writers_get_distinct_revisions_and_watchers_see_them_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut changes = store.hub().subscribe(&"".into(), &"things".into());
    let mut writers = tokio::task::JoinSet::new();
    for n in 0..100 {
        let store = store.clone();
        writers.spawn(async move { put(&store, &format!("n{n}"), None, json!(n)).await });
    }
    let mut revisions: Vec<i64> =
        writers.join_all().await.iter().map(|object| revision_of(object).unwrap()).collect();
    revisions.sort_unstable();
    let mut published = Vec::new();
    while let Ok(event) = changes.try_recv() {
        published.push(event.revision);
    }
    assert_eq!(published, revisions);
    assert_eq!(revisions.last(), Some(&store.current()));
    store.close().await;
}

#[tokio::test]
async fn full_disk_refuses_the_write_and_keeps_what_was_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    store.limit_pages(60).await;
    let mut stored = 0;
    let error = loop {
        let name = format!("n{stored}");
        let object = Some(json!({"metadata": {"name": name}, "value": "x".repeat(2000)}));
        match store.write(Write { key: key(&name), seen: None, object, expires: None }).await {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, StoreError::Full { .. }), "{error}");
    let revision = store.current();
    assert_eq!(store.list(range(), |_| true).await.unwrap().items.len(), stored);
    store.limit_pages(10_000).await;
    put(&store, "after", None, json!(1)).await;
    assert_eq!(store.current(), revision + 1, "no revision was lost to the refused write");
    store.close().await;
    drop(store);
    assert_eq!(open(dir.path()).list(range(), |_| true).await.unwrap().items.len(), stored + 1);
}

#[tokio::test]
async fn damaged_file_is_named_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for n in 0..200 {
        put(&store, &format!("n{n}"), None, json!("x".repeat(500))).await;
    }
    store.close().await;
    drop(store);
    let path = dir.path().join("objects.db");
    let mut file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.seek(SeekFrom::Start(4096 * 8)).unwrap();
    file.write_all(&[0xa5; 4096 * 4]).unwrap();
    let before = std::fs::read(&path).unwrap();

    // A program that another test starts holds the lock too, from its fork to its exec.
    let error = loop {
        match Store::open(dir.path(), Durability::Relaxed, Arc::new(Hub::new())).err().unwrap() {
            OpenError::InUse { .. } => tokio::task::yield_now().await,
            error => break error,
        }
    };
    assert!(matches!(error, OpenError::Damaged { .. }), "{error}");
    assert!(error.to_string().contains("objects.db"), "{error}");
    assert!(std::fs::read(&path).unwrap() == before);
}

#[test]
fn file_that_is_no_database_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("objects.db"), "this is not a database ".repeat(400)).unwrap();
    let error = Store::open(dir.path(), Durability::Relaxed, Arc::new(Hub::new())).err().unwrap();
    assert!(matches!(error, OpenError::Damaged { .. }), "{error}");
}

#[tokio::test]
async fn emptied_file_and_foreign_log_are_refused_and_left_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    put(&store, "a", None, json!("x")).await;
    store.close().await;
    drop(store);
    let reopen = || Store::open(dir.path(), Durability::Relaxed, Arc::new(Hub::new()));
    let (path, wal) = (dir.path().join("objects.db"), dir.path().join("objects.db-wal"));

    std::fs::write(&wal, [0xa5; 9000]).unwrap();
    let error = reopen().err().unwrap();
    assert!(matches!(error, OpenError::Damaged { .. }), "{error}");
    assert!(error.to_string().contains("objects.db-wal"), "{error}");
    assert!(error.hint().is_some());
    assert_eq!(std::fs::read(&wal).unwrap(), [0xa5; 9000]);
    std::fs::remove_file(&wal).unwrap();

    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, "").unwrap();
    let error = reopen().err().unwrap();
    assert!(matches!(error, OpenError::Damaged { .. }), "{error}");
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);

    std::fs::write(&path, whole).unwrap();
    assert!(reopen().unwrap().current() > 1);
}

#[tokio::test]
async fn start_that_was_killed_while_it_made_the_database_is_taken_up() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("objects.half"), "half a page").unwrap();
    std::fs::write(dir.path().join("objects.half-journal"), "half a page").unwrap();
    let store = open(dir.path());
    put(&store, "a", None, json!("x")).await;
    store.close().await;
    assert!(!dir.path().join("objects.half").exists());
}

#[tokio::test]
async fn second_server_on_the_same_folder_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let second = Store::open(dir.path(), Durability::Relaxed, Arc::new(Hub::new()));
    assert!(matches!(second, Err(OpenError::InUse { .. })));
    store.close().await;
}

/// Not a test: what [`acknowledged_writes_survive_kill_9`] starts and kills. Prints each acknowledged write.
#[tokio::test]
#[ignore = "runs until it is killed"]
async fn child_that_writes_until_it_is_killed() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    let store = Store::open(Path::new(&dir), Durability::Full, Arc::new(Hub::new())).unwrap();
    let mut writers = tokio::task::JoinSet::new();
    let run = store.current();
    for writer in 0..4 {
        let store = store.clone();
        writers.spawn(async move {
            for n in 0.. {
                let name = format!("r{run}-w{writer}-{n}");
                let first = put(&store, &name, None, json!("x".repeat(1500))).await;
                let second = put(&store, &name, Some(first), json!(n)).await;
                println!("\nacked {name} {n} {}", revision_of(&second).unwrap());
            }
        });
    }
    writers.join_all().await;
}

#[tokio::test]
async fn acknowledged_writes_survive_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let mut acked: HashMap<String, (i64, i64)> = HashMap::new();
    for round in 1..=3 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture"])
            .arg("store::tests::child_that_writes_until_it_is_killed")
            .env(CHILD_DIR, dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut read = 0;
        for line in lines.by_ref() {
            read += usize::from(note(&line.unwrap(), &mut acked));
            if read == 25 * round {
                child.kill().unwrap(); // SIGKILL, in the middle of four writers' commits
                break;
            }
        }
        for line in lines.map_while(Result::ok) {
            note(&line, &mut acked);
        }
        child.wait().unwrap();

        let store = open(dir.path()); // checks the file
        for (name, (value, revision)) in &acked {
            let found = store.get(&key(name)).await.unwrap();
            let found = found.unwrap_or_else(|| panic!("`{name}` was acknowledged and is lost"));
            assert_eq!(found["value"], *value, "{name}");
            assert_eq!(revision_of(&found), Some(*revision), "{name}");
        }
        let newest = acked.values().map(|(_, revision)| *revision).max().unwrap();
        assert!(store.current() >= newest, "the counter never goes back");
        store.close().await;
    }
}

fn note(line: &str, acked: &mut HashMap<String, (i64, i64)>) -> bool {
    let words: Vec<&str> = line.split(' ').collect();
    if let ["acked", name, value, revision] = words.as_slice()
        && let (Ok(value), Ok(revision)) = (value.parse(), revision.parse())
    {
        acked.insert((*name).to_owned(), (value, revision));
        return true;
    }
    false
}
