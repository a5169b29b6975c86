//! Devices and mappers in the node's database: tables, and the statements that [`crate::meta_store`] runs on its
//! connections.
//!
//! What the rows mean is told in [`skerry_edge_core::twin`]. A row that cannot be read is as good as none: the device is
//! here because its object is, and its values are reported again.

use rusqlite::{Connection, params};
use skerry_edge_core::rules::RuleLimits;
use skerry_edge_core::twin::mapper::{Change, Object};
use skerry_edge_core::twin::{Kept, Write};

/// The tables, for a new database and for one that was made before there were devices.
pub(crate) const TABLES: &str = "
    CREATE TABLE twins (id TEXT PRIMARY KEY, json TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE mappers (protocol TEXT PRIMARY KEY, json TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE mapper_knows (protocol TEXT NOT NULL, kind TEXT NOT NULL, id TEXT NOT NULL, digest TEXT NOT NULL,
        PRIMARY KEY (protocol, kind, id)) WITHOUT ROWID;
    CREATE TABLE followed_topics (topic TEXT PRIMARY KEY) WITHOUT ROWID;
";

const DEVICE: &str = "device";
const MODEL: &str = "model";

/// Carries out one change inside a transaction.
pub(crate) fn apply(connection: &Connection, write: &Write) -> rusqlite::Result<()> {
    match write {
        Write::Device(id, row) => {
            // Only text keys are in it.
            let json = serde_json::to_string(row).unwrap_or_default();
            connection
                .prepare_cached("INSERT OR REPLACE INTO twins VALUES (?1, ?2)")?
                .execute(params![&**id, json])
        }
        Write::Forget(id) => {
            connection.prepare_cached("DELETE FROM twins WHERE id = ?1")?.execute([&**id])
        }
        Write::Mapper(Change::Mapper(info)) => {
            connection.execute("DELETE FROM mapper_knows WHERE protocol = ?1", [&info.protocol])?;
            let json = serde_json::to_string(info).unwrap_or_default();
            connection.execute(
                "INSERT OR REPLACE INTO mappers VALUES (?1, ?2)",
                params![info.protocol, json],
            )
        }
        Write::Mapper(Change::Knows { protocol, of, digest }) => {
            let (kind, id) = match of {
                Object::Device(id) => (DEVICE, id),
                Object::Model(id) => (MODEL, id),
            };
            match digest {
                Some(digest) => connection
                    .prepare_cached("INSERT OR REPLACE INTO mapper_knows VALUES (?1, ?2, ?3, ?4)")?
                    .execute(params![protocol, kind, &**id, digest]),
                None => connection
                    .prepare_cached(
                        "DELETE FROM mapper_knows WHERE protocol = ?1 AND kind = ?2 AND id = ?3",
                    )?
                    .execute(params![protocol, kind, &**id]),
            }
        }
    }
    .map(drop)
}

/// Everything that is kept.
pub(crate) fn read_all(connection: &Connection) -> rusqlite::Result<Kept> {
    let texts = |sql: &str| -> rusqlite::Result<Vec<(String, String)>> {
        let mut query = connection.prepare(sql)?;
        query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
    };
    let devices = texts("SELECT id, json FROM twins ORDER BY id")?;
    let mappers = texts("SELECT protocol, json FROM mappers ORDER BY protocol")?;
    let mut query = connection.prepare("SELECT protocol, kind, id, digest FROM mapper_knows")?;
    let knows = query.query_map([], |row| {
        let (kind, id): (String, String) = (row.get(1)?, row.get(2)?);
        let of = match kind.as_str() {
            DEVICE => Object::Device(id.into()),
            _ => Object::Model(id.into()),
        };
        Ok((row.get(0)?, of, row.get(3)?))
    })?;
    Ok(Kept {
        devices: devices
            .into_iter()
            .filter_map(|(id, json)| Some((id, serde_json::from_str(&json).ok()?)))
            .collect(),
        mappers: mappers
            .into_iter()
            .filter_map(|(_, json)| serde_json::from_str(&json).ok())
            .collect(),
        knows: knows.collect::<rusqlite::Result<_>>()?,
    })
}

/// Remembers that a rule of the cloud wants a topic of the broker, or wants it no more.
pub(crate) fn follow(connection: &Connection, topic: &str, wanted: bool) -> rusqlite::Result<()> {
    let sql = match wanted {
        true => "INSERT OR REPLACE INTO followed_topics VALUES (?1)",
        false => "DELETE FROM followed_topics WHERE topic = ?1",
    };
    connection.execute(sql, [topic]).map(drop)
}

/// Topics that rules of the cloud want.
pub(crate) fn followed(connection: &Connection) -> rusqlite::Result<Vec<String>> {
    let mut query = connection.prepare("SELECT topic FROM followed_topics ORDER BY topic")?;
    query.query_map([], |row| row.get(0))?.collect()
}

/// Made with the first row and no part of the version: an older agent knows nothing of it and runs all the same.
const LIMITS: &str =
    "CREATE TABLE IF NOT EXISTS rule_limits (rule TEXT NOT NULL, active INTEGER NOT NULL,
    workload TEXT NOT NULL, replicas INTEGER NOT NULL, PRIMARY KEY (rule, workload)) WITHOUT ROWID";

/// Keeps what a rule lets run.
pub(crate) fn limit(connection: &Connection, limits: &RuleLimits) -> rusqlite::Result<()> {
    connection.execute(LIMITS, [])?;
    connection.execute("DELETE FROM rule_limits WHERE rule = ?1", [&*limits.rule])?;
    for (workload, replicas) in &limits.limits {
        connection.execute(
            "INSERT INTO rule_limits VALUES (?1, ?2, ?3, ?4)",
            params![&*limits.rule, limits.active, workload, replicas],
        )?;
    }
    Ok(())
}

/// What rules let run.
pub(crate) fn limits(connection: &Connection) -> rusqlite::Result<Vec<RuleLimits>> {
    let exists = "SELECT EXISTS (SELECT 1 FROM sqlite_master WHERE name = 'rule_limits')";
    if !connection.query_row(exists, [], |row| row.get::<_, bool>(0))? {
        return Ok(Vec::new());
    }
    let mut query = connection.prepare(
        "SELECT rule, active, workload, replicas FROM rule_limits ORDER BY rule, workload",
    )?;
    let mut found: Vec<RuleLimits> = Vec::new();
    let mut rows = query.query([])?;
    while let Some(row) = rows.next()? {
        let (rule, active): (String, bool) = (row.get(0)?, row.get(1)?);
        let one = (row.get(2)?, row.get(3)?);
        match found.last_mut().filter(|last| *last.rule == *rule) {
            Some(last) => last.limits.push(one),
            None => found.push(RuleLimits { rule: rule.into(), active, limits: vec![one] }),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use skerry_edge_core::twin::DeviceRow;
    use skerry_edge_core::twin::mapper::Info;

    #[test]
    fn what_rules_let_run_is_replaced_as_a_whole() {
        let connection = Connection::open_in_memory().expect("a database");
        assert!(limits(&connection).expect("no table is nothing").is_empty());
        let one = |rule: &str, active, limits: &[(&str, u32)]| RuleLimits {
            rule: rule.into(),
            active,
            limits: limits.iter().map(|(workload, most)| ((*workload).to_owned(), *most)).collect(),
        };
        limit(&connection, &one("a/x", true, &[("web", 0), ("app", 2)])).expect("written");
        limit(&connection, &one("a/y", false, &[("web", 1)])).expect("written");
        limit(&connection, &one("a/x", false, &[("web", 3)])).expect("written");
        let kept = limits(&connection).expect("readable");
        assert_eq!(kept, [one("a/x", false, &[("web", 3)]), one("a/y", false, &[("web", 1)])]);
        limit(&connection, &one("a/x", false, &[])).expect("written");
        assert_eq!(limits(&connection).expect("readable"), kept[1..]);
    }

    #[test]
    fn what_is_kept_comes_back_and_a_mapper_that_begins_anew_knows_nothing() {
        let connection = Connection::open_in_memory().expect("a database");
        connection.execute_batch(TABLES).expect("tables");
        let row = DeviceRow { uid: "u".into(), state: "ok".into(), ..DeviceRow::default() };
        let info = Info { protocol: "modbus".into(), address: "/a".into(), ..Info::default() };
        let knows = |id: &str, digest: Option<&str>| {
            let of = Object::Device(id.into());
            let digest = digest.map(str::to_owned);
            Write::Mapper(Change::Knows { protocol: "modbus".into(), of, digest })
        };
        for write in [
            Write::Device("a/b".into(), row.clone()),
            Write::Device("a/c".into(), row.clone()),
            Write::Forget("a/c".into()),
            Write::Mapper(Change::Mapper(info.clone())),
            knows("a/b", Some("1")),
            knows("a/c", Some("2")),
            knows("a/c", None),
        ] {
            apply(&connection, &write).expect("written");
        }
        connection.execute("INSERT INTO twins VALUES ('x/y', 'no JSON')", []).expect("written");
        let kept = read_all(&connection).expect("readable");
        assert_eq!(kept.devices, [("a/b".to_owned(), row)]);
        assert_eq!(kept.mappers, std::slice::from_ref(&info));
        assert_eq!(kept.knows, [("modbus".into(), Object::Device("a/b".into()), "1".to_owned())]);
        apply(&connection, &Write::Mapper(Change::Mapper(info))).expect("written");
        assert!(read_all(&connection).expect("readable").knows.is_empty());
        follow(&connection, "a/t", true).expect("written");
        follow(&connection, "a/t", true).expect("written");
        assert_eq!(followed(&connection).expect("readable"), ["a/t"]);
        follow(&connection, "a/t", false).expect("written");
        assert!(followed(&connection).expect("readable").is_empty());
    }
}
