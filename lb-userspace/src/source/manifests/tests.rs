use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::*;
use crate::model::Change;
use crate::source::CHANNEL;

/// Machines are shared and slow.
const PATIENCE: Duration = Duration::from_secs(20);

struct World {
    dir: tempfile::TempDir,
    events: mpsc::Receiver<Event>,
    thread: JoinHandle<()>,
}

impl World {
    fn new(files: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        Self::following(dir)
    }

    fn following(dir: tempfile::TempDir) -> Self {
        let (sender, events) = mpsc::channel(CHANNEL);
        let thread = follow(dir.path(), sender).unwrap();
        Self { dir, events, thread }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// The next event, as text.
    fn next(&mut self) -> String {
        let start = Instant::now();
        loop {
            match self.events.try_recv() {
                Ok(Event::Listed(kind)) => return format!("listed {kind}"),
                Ok(Event::Changed(Change::Node(node))) => {
                    return format!("{}={}", node.name, node.zone.unwrap_or_default());
                }
                Ok(Event::Changed(Change::NodeGone(name))) => return format!("-{name}"),
                Ok(Event::Unreadable(None, count)) => return format!("{count} unreadable"),
                Ok(other) => panic!("{other:?}"),
                Err(_) => assert!(start.elapsed() < PATIENCE, "nothing came"),
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn listed(&mut self) {
        for kind in [Kind::ServiceCidrs].into_iter().chain(Kind::ALL) {
            assert_eq!(self.next(), format!("listed {kind}"));
        }
    }

    /// Asserts that nothing is on its way, by sending something after it.
    fn quiet(&mut self) {
        self.write("zz-marker.yaml", &node("marker", "z"));
        assert_eq!(self.next(), "marker=z");
        fs::remove_file(self.path("zz-marker.yaml")).unwrap();
        assert_eq!(self.next(), "-marker");
    }
}

fn node(name: &str, zone: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: {name}, labels: {{topology.kubernetes.io/zone: \"{zone}\"}}}}\n"
    )
}

#[test]
fn the_directory_is_listed_and_followed() {
    let mut world = World::new(&[("a.yaml", &node("a", "1")), ("b.yml", &node("b", "1")), ("c.txt", "x: [")]);
    assert_eq!(world.next(), "a=1");
    assert_eq!(world.next(), "b=1");
    world.listed();
    world.write("a.yaml", &node("a", "2"));
    assert_eq!(world.next(), "a=2");
    world.write("new.yaml", &node("c", "1"));
    assert_eq!(world.next(), "c=1");
    fs::remove_file(world.path("b.yml")).unwrap();
    assert_eq!(world.next(), "-b");
    world.write(".hidden.yaml", &node("h", "1"));
    world.write("a.yaml.swp", &node("h", "1"));
    fs::create_dir(world.path("directory.yaml")).unwrap();
    world.quiet();
}

/// As editors and `kubectl cp` write.
#[test]
fn a_renamed_file_counts_at_once() {
    let mut world = World::new(&[("a.yaml", &node("a", "1"))]);
    assert_eq!(world.next(), "a=1");
    world.listed();
    world.write(".a.yaml.tmp", &node("a", "2"));
    fs::rename(world.path(".a.yaml.tmp"), world.path("a.yaml")).unwrap();
    assert_eq!(world.next(), "a=2");
    // Moved away and back under another name: the object stays.
    fs::rename(world.path("a.yaml"), world.path("b.yaml")).unwrap();
    assert_eq!(world.next(), "a=2");
    world.quiet();
}

/// The news of the old name may come before that of the new one.
#[test]
fn a_file_that_has_another_name_by_now_takes_nothing_along() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.yaml"), node("a", "1")).unwrap();
    let (events, mut received) = mpsc::channel(CHANNEL);
    let mut follower = Follower {
        path: dir.path().to_owned(),
        files: BTreeMap::new(),
        table: Table::default(),
        events,
        unreadable: None,
        problems: BTreeMap::new(),
    };
    follower.look_at_all().unwrap();
    fs::rename(dir.path().join("a.yaml"), dir.path().join("b.yaml")).unwrap();
    follower.look_at([OsString::from("a.yaml")], true).unwrap();
    follower.look_at([OsString::from("b.yaml")], true).unwrap();
    while let Ok(event) = received.try_recv() {
        assert!(matches!(event, Event::Changed(Change::Node(_))), "{event:?}");
    }
}

/// As the kubelet mounts a ConfigMap.
#[test]
fn a_swapped_symbolic_link_counts() {
    let mut world = World::new(&[]);
    world.listed();
    let swap = |version: &str, text: &str| {
        let data = world.dir.path().join(format!("..{version}"));
        fs::create_dir(&data).unwrap();
        fs::write(data.join("a.yaml"), text).unwrap();
        std::os::unix::fs::symlink(format!("..{version}"), world.dir.path().join("..data_tmp")).unwrap();
        fs::rename(world.dir.path().join("..data_tmp"), world.dir.path().join("..data")).unwrap();
    };
    swap("v1", &node("a", "1"));
    std::os::unix::fs::symlink("..data/a.yaml", world.dir.path().join("a.yaml")).unwrap();
    swap("v2", &node("a", "2"));
    let mut seen = world.next();
    if seen == "a=1" {
        seen = world.next();
    }
    assert_eq!(seen, "a=2");
}

#[test]
fn a_broken_file_keeps_what_it_said() {
    let both = format!("{}---\n{}", node("a", "1"), node("b", "1"));
    let mut world = World::new(&[("f.yaml", &both), ("bad.yaml", "kind: [")]);
    assert_eq!(world.next(), "a=1");
    assert_eq!(world.next(), "b=1");
    assert_eq!(world.next(), "1 unreadable");
    world.listed();
    world.write("f.yaml", &format!("{}---\nkind: [", node("a", "2")));
    assert_eq!(world.next(), "a=2");
    assert_eq!(world.next(), "2 unreadable");
    world.quiet();
    world.write("f.yaml", &node("a", "2"));
    assert_eq!(world.next(), "-b");
    assert_eq!(world.next(), "1 unreadable");
    // Not UTF-8 is not readable, either.
    fs::write(world.path("f.yaml"), [0xff, 0xfe]).unwrap();
    assert_eq!(world.next(), "2 unreadable");
    world.quiet();
    fs::remove_file(world.path("f.yaml")).unwrap();
    assert_eq!(world.next(), "-a");
    assert_eq!(world.next(), "1 unreadable");
}

#[test]
fn a_directory_that_is_replaced_is_followed_on() {
    let outer = tempfile::tempdir().unwrap();
    let path = outer.path().join("manifests");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("a.yaml"), node("a", "1")).unwrap();
    let (sender, events) = mpsc::channel(CHANNEL);
    let thread = follow(&path, sender).unwrap();
    let mut world = World { dir: outer, events, thread };
    assert_eq!(world.next(), "a=1");
    world.listed();
    let new = world.path("new");
    fs::create_dir(&new).unwrap();
    fs::write(new.join("a.yaml"), node("a", "2")).unwrap();
    fs::rename(&path, world.path("old")).unwrap();
    fs::rename(&new, &path).unwrap();
    assert_eq!(world.next(), "a=2");
    fs::write(path.join("a.yaml"), node("a", "3")).unwrap();
    assert_eq!(world.next(), "a=3");
}

#[test]
fn it_ends_when_nobody_listens() {
    let world = World::new(&[]);
    drop(world.events);
    let start = Instant::now();
    while !world.thread.is_finished() {
        assert!(start.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(5));
    }
    world.thread.join().unwrap();
}

#[test]
fn no_directory_is_an_error() {
    let (sender, _events) = mpsc::channel(1);
    let error = follow(Path::new("/nowhere/at/all"), sender).unwrap_err();
    assert_eq!(error.to_string(), "--manifests /nowhere/at/all: No such file or directory (os error 2)");
}

/// Whoever may write into the directory can neither stop nor fill the agent.
#[test]
fn hostile_files_are_named_and_nothing_else_suffers() {
    let laughs = |line: &str| {
        let again = (1..9).map(|n| format!("n{n}: &{n} [{}]\n", vec![format!("*{}", n - 1); 20].join(", ")));
        format!("n0: &0 [{line}]\n{}", again.collect::<String>())
    };
    let deep = |open: &str| format!("kind: {}\n", open.repeat(100_000));
    let many = "---\na: 1\n".repeat(200_000);
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    nix::unistd::mkfifo(&path("pipe.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::os::unix::fs::symlink("/dev/zero", path("device.yaml")).unwrap();
    std::os::unix::fs::symlink("loop.yaml", path("loop.yaml")).unwrap();
    fs::File::create(path("huge.yaml")).unwrap().set_len(1 << 30).unwrap();
    fs::write(path("long.yaml"), format!("kind: {}\n", "x".repeat(5 << 20))).unwrap();
    fs::write(path("laughs.yaml"), laughs("ha, ha")).unwrap();
    fs::write(path("deep.yaml"), deep("[")).unwrap();
    fs::write(path("deep.json"), "[".repeat(100_000)).unwrap();
    fs::write(path("few-bytes.json"), format!("[{}0]", "0,".repeat(3_000_000))).unwrap();
    fs::write(path("bytes.yaml"), [0xff, 0xfe, 0x80]).unwrap();
    fs::write(path("many.yaml"), many).unwrap();
    fs::create_dir(path("directory.yaml")).unwrap();
    fs::write(path("zz.yaml"), node("a", "1")).unwrap();
    let mut world = World::following(dir);
    assert_eq!(world.next(), "a=1");
    // One for each file, and for each of the documents that count.
    assert_eq!(world.next(), format!("{} unreadable", 10 + 100_001));
    world.listed();
    for name in ["pipe.yaml", "device.yaml", "loop.yaml", "many.yaml"] {
        fs::remove_file(world.path(name)).unwrap();
    }
    while world.next() != "7 unreadable" {}
    world.quiet();
}
