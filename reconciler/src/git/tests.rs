//! Remotes of every kind, with real repositories; http is git's own server program behind a socket of ours.

use super::*;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicUsize;

#[test]
fn a_url_is_shown_without_its_credentials() {
    assert_eq!(
        without_credentials("https://me:secret@example.com/a@b.git"),
        "https://example.com/a@b.git"
    );
    assert_eq!(without_credentials("https://example.com/a@b.git"), "https://example.com/a@b.git");
    assert_eq!(without_credentials("/srv/fleet.git"), "/srv/fleet.git");
}

#[test]
fn a_remote_that_needs_ssh_is_refused_with_what_to_do() {
    for remote in ["ssh://git@example.com/fleet.git", "git@example.com:fleet.git"] {
        let error = Remote::new(remote, "main", Path::new("unused")).err().expect("not supported");
        assert!(matches!(error, GitError::Unsupported(_)));
        assert!(error.hint().is_some());
    }
}

/// A bare repository with a branch `main`, and a clone to commit in.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let world = Self { dir: tempfile::tempdir().unwrap() };
        world.git(".", &["init", "--quiet", "--bare", "--initial-branch=main", "remote.git"]);
        world.git(".", &["clone", "--quiet", "remote.git", "work"]);
        world.git("work", &["checkout", "--quiet", "-b", "main"]);
        world
    }

    fn git(&self, dir: &str, arguments: &[&str]) -> String {
        let output = Command::new("git")
            .args([
                "-c",
                "user.name=Test",
                "-c",
                "user.email=test@example.com",
                "-c",
                "commit.gpgsign=false",
            ])
            .args(arguments)
            .current_dir(self.dir.path().join(dir))
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "git {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn write(&self, path: &str, content: &str) {
        let path = self.dir.path().join("work").join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    fn push(&self) -> String {
        self.git("work", &["add", "--all"]);
        self.git("work", &["commit", "--quiet", "--allow-empty", "--message", "change"]);
        self.git("work", &["push", "--quiet", "--force", "origin", "main"]);
        self.git("work", &["rev-parse", "HEAD"])
    }

    fn remote(&self, remote: &str) -> Remote {
        Remote::new(remote, "main", &self.dir.path().join("copies")).unwrap()
    }

    fn path(&self) -> String {
        self.dir.path().join("remote.git").display().to_string()
    }
}

fn poll(remote: &mut Remote) -> Result<Option<Commit>, GitError> {
    remote.poll(&AtomicBool::new(false))
}

fn paths(commit: &Commit) -> Vec<&str> {
    commit.source.paths().collect()
}

/// What every remote has to do, whatever the way to it.
fn check_remote(world: &World, mut remote: Remote, knows_history: bool) {
    assert!(matches!(poll(&mut remote), Err(GitError::NoBranch { .. })));
    world.write("fleet.yaml", "one");
    world.write("sites/a.yaml", "a");
    world.write("README.md", "not ours");
    world.write("other/x.yaml", "not ours");
    let first = world.push();
    let commit = poll(&mut remote).unwrap().expect("a first commit");
    assert_eq!(commit.revision, first);
    assert_eq!(paths(&commit), ["fleet.yaml", "sites/a.yaml"]);
    assert!(!commit.rewritten);
    assert!(poll(&mut remote).unwrap().is_none());

    world.write("apps/web/manifests/deep/er/x.yaml", "x");
    let second = world.push();
    let commit = poll(&mut remote).unwrap().expect("a second commit");
    assert_eq!(commit.revision, second);
    assert_eq!(paths(&commit), ["apps/web/manifests/deep/er/x.yaml", "fleet.yaml", "sites/a.yaml"]);
    assert!(!commit.rewritten);

    world.git("work", &["reset", "--quiet", "--hard", &first]);
    world.write("sites/b.yaml", "b");
    let third = world.push();
    let commit = poll(&mut remote).unwrap().expect("a rewritten head");
    assert_eq!(commit.revision, third);
    assert_eq!(paths(&commit), ["fleet.yaml", "sites/a.yaml", "sites/b.yaml"]);
    assert_eq!(commit.rewritten, knows_history);
}

#[test]
fn a_local_path_is_followed_through_commits_and_rewrites() {
    let world = World::new();
    check_remote(&world, world.remote(&world.path()), true);
}

#[test]
fn a_file_url_is_the_same_as_a_path() {
    let world = World::new();
    check_remote(&world, world.remote(&format!("file://{}", world.path())), true);
}

#[test]
fn http_is_followed_through_commits_and_rewrites_and_fetches_only_the_newest() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let world = World::new();
    let server = Server::start(world.dir.path());
    check_remote(&world, world.remote(&format!("http://{}/remote.git", server.address)), false);
    // A second reader starts from the copy that the first one left.
    let mut again = world.remote(&format!("http://{}/remote.git", server.address));
    assert_eq!(
        paths(&poll(&mut again).unwrap().unwrap()),
        ["fleet.yaml", "sites/a.yaml", "sites/b.yaml"]
    );
    let copies = world.dir.path().join("copies");
    let copy = std::fs::read_dir(copies).unwrap().next().unwrap().unwrap().path();
    let shallow = std::fs::read_to_string(copy.join("shallow")).unwrap();
    assert!(!shallow.is_empty(), "the copy has a border");
}

#[test]
fn a_server_that_wants_credentials_or_is_not_there_is_told_apart() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let world = World::new();
    let server = Server::start(world.dir.path());
    let mut remote = world.remote(&format!("http://{}/private/remote.git", server.address));
    let error = poll(&mut remote).unwrap_err();
    assert!(matches!(error, GitError::Credentials { .. }), "{error:?}");
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut remote = world.remote(&format!("http://{nobody}/remote.git"));
    let error = poll(&mut remote).unwrap_err();
    assert!(matches!(error, GitError::Fetch { .. }), "{error:?}");
}

#[test]
fn a_remote_that_goes_and_comes_back_is_read_again() {
    let world = World::new();
    world.write("fleet.yaml", "one");
    world.push();
    let mut remote = world.remote(&world.path());
    poll(&mut remote).unwrap().unwrap();
    let away = world.dir.path().join("away.git");
    std::fs::rename(world.path(), &away).unwrap();
    assert!(matches!(poll(&mut remote), Err(GitError::Gone { .. })));
    std::fs::rename(&away, world.path()).unwrap();
    assert!(poll(&mut remote).unwrap().is_none(), "the same head is no news");
}

#[test]
fn links_and_large_files_are_noted_and_not_read() {
    let world = World::new();
    let fleet = "apiVersion: fleet.skerry.dev/v1alpha1\nkind: Fleet\nmetadata: {name: x}\n";
    world.write("fleet.yaml", fleet);
    world.write("sites/large.yaml", &"#".repeat(FILE_MAX + 1));
    let link = |from: &str, to: &str| {
        std::os::unix::fs::symlink(to, world.dir.path().join("work").join(from)).unwrap();
    };
    link("sites/link.yaml", "large.yaml");
    link("apps", "sites");
    world.push();
    let commit = poll(&mut world.remote(&world.path())).unwrap().unwrap();
    assert_eq!(paths(&commit), ["apps/", "fleet.yaml", "sites/large.yaml", "sites/link.yaml"]);
    let rendered = skerry_reconciler_core::render(&commit.source);
    assert!(rendered.roster.is_none(), "nothing counts as removed");
    let mut problems: Vec<_> = rendered
        .problems
        .iter()
        .map(|problem| (problem.file.as_str(), &problem.message[..10]))
        .collect();
    problems.sort();
    assert_eq!(
        problems,
        [
            ("apps/", "symbolic l"),
            ("sites/large.yaml", "the file h"),
            ("sites/link.yaml", "symbolic l"),
        ]
    );
}

#[test]
fn a_history_that_was_rewritten_while_nobody_looked_is_noticed() {
    let world = World::new();
    world.write("fleet.yaml", "one");
    world.push();
    let before = world.push();
    world.git("work", &["reset", "--quiet", "--hard", "HEAD~1"]);
    world.write("fleet.yaml", "two");
    world.push();
    let mut remote = world.remote(&world.path());
    remote.remember(&before);
    assert!(poll(&mut remote).unwrap().unwrap().rewritten);
}

/// `git http-backend` behind a listener; everything below `/private/` asks for a password.
struct Server {
    address: std::net::SocketAddr,
    requests: Arc<AtomicUsize>,
}

impl Server {
    fn start(root: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self { address: listener.local_addr().unwrap(), requests: Arc::default() };
        let (root, requests) = (root.to_owned(), server.requests.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                requests.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let root = root.clone();
                std::thread::spawn(move || answer(stream, &root));
            }
        });
        server
    }
}

fn answer(stream: TcpStream, root: &Path) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut stream = stream;
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let mut words = line.split_whitespace();
    let (method, target) =
        (words.next().unwrap_or("").to_owned(), words.next().unwrap_or("").to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    if target.starts_with("/private/") {
        let _ = stream.write_all(
            b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        );
        return;
    }
    let mut body = Vec::new();
    if let Some(length) = headers.get("content-length").and_then(|length| length.parse().ok()) {
        body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
    } else if headers.contains_key("transfer-encoding") {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size).unwrap();
            let size = usize::from_str_radix(size.trim(), 16).unwrap();
            let mut chunk = vec![0; size + 2];
            reader.read_exact(&mut chunk).unwrap();
            body.extend_from_slice(&chunk[..size]);
            if size == 0 {
                break;
            }
        }
    }
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let header = |name: &str| headers.get(name).cloned().unwrap_or_default();
    let mut child = Command::new("git")
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("REQUEST_METHOD", method)
        .env("PATH_INFO", path)
        .env("QUERY_STRING", query)
        .env("CONTENT_TYPE", header("content-type"))
        .env("CONTENT_LENGTH", body.len().to_string())
        .env("HTTP_CONTENT_ENCODING", header("content-encoding"))
        .env("GIT_PROTOCOL", header("git-protocol"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(&body).unwrap();
    drop(input);
    let output = child.wait_with_output().unwrap().stdout;
    let end = output.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
    let head = String::from_utf8_lossy(&output[..end]).into_owned();
    let status =
        head.lines().find_map(|line| line.strip_prefix("Status: ")).unwrap_or("200 OK").to_owned();
    let rest: String = head
        .lines()
        .filter(|line| !line.starts_with("Status:"))
        .map(|line| format!("{line}\r\n"))
        .collect();
    let content = &output[end + 4..];
    let _ = write!(
        stream,
        "HTTP/1.1 {status}\r\n{rest}Content-Length: {}\r\nConnection: close\r\n\r\n",
        content.len()
    );
    let _ = stream.write_all(content);
}

#[test]
fn digits_of_a_port_are_no_status_code() {
    assert!(is_refusal("received http status 401"));
    assert!(is_refusal("http status: 403, forbidden"));
    assert!(!is_refusal("could not connect to 127.0.0.1:40312: connection refused"));
}
