//! The outbox in the node's database: its table, and the statements that [`crate::meta_store`] runs on its connections.
//!
//! All changes of one turn of the agent's loop are one transaction. What the rows mean is told in
//! [`skerry_edge_core::outbox`].

use rusqlite::{Connection, OptionalExtension, params};
use skerry_edge_core::outbox::{Change, Kind, Row};
use skerry_protocol::Operation;
use std::sync::Arc;

/// The table, for a new database and for one that was made before there was an outbox.
pub(crate) const TABLE: &str = "
    CREATE TABLE outbox (seq INTEGER PRIMARY KEY, key TEXT NOT NULL, kind TEXT NOT NULL, operation TEXT NOT NULL,
        resource TEXT NOT NULL, content TEXT NOT NULL);
";

/// Carries out one change inside a transaction.
pub(crate) fn apply(connection: &Connection, change: &Change) -> rusqlite::Result<()> {
    match change {
        Change::Put { seq, item } => connection
            .prepare_cached("INSERT OR REPLACE INTO outbox VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?
            .execute(params![
                number(*seq),
                item.key,
                item.kind.as_str(),
                item.operation.as_str(),
                item.resource,
                item.content,
            ]),
        Change::Remove { seq } => {
            connection.prepare_cached("DELETE FROM outbox WHERE seq = ?1")?.execute([number(*seq)])
        }
    }
    .map(drop)
}

/// Every row, oldest first. A row of an unknown kind or operation is left in place: a newer agent may have written it.
pub(crate) fn read_all(connection: &Connection) -> rusqlite::Result<Vec<Row>> {
    let mut query = connection.prepare(
        "SELECT seq, key, kind, operation, resource, octet_length(content) FROM outbox ORDER BY seq",
    )?;
    let rows = query.query_map([], |row| {
        let (kind, operation): (String, String) = (row.get(2)?, row.get(3)?);
        let (seq, len): (i64, i64) = (row.get(0)?, row.get(5)?);
        let known = Kind::parse(&kind).zip(Operation::parse(&operation));
        Ok(known.map(|(kind, operation)| {
            Ok::<_, rusqlite::Error>(Row {
                seq: u64::try_from(seq).unwrap_or(0),
                key: row.get(1)?,
                kind,
                operation,
                resource: row.get(4)?,
                len: usize::try_from(len).unwrap_or(0),
            })
        }))
    })?;
    rows.filter_map(Result::transpose).map(Result::flatten).collect()
}

/// The content of one row.
pub(crate) fn read_content(
    connection: &Connection,
    seq: u64,
) -> rusqlite::Result<Option<Arc<str>>> {
    connection
        .prepare_cached("SELECT content FROM outbox WHERE seq = ?1")?
        .query_row([number(seq)], |row| row.get(0))
        .optional()
}

/// SQLite counts to 2^63; a node that writes a row every microsecond gets there in 292,000 years.
fn number(seq: u64) -> i64 {
    i64::try_from(seq).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use skerry_edge_core::outbox::Item;

    fn put(seq: u64, content: &str) -> Change {
        let item = Item {
            key: format!("k{seq}"),
            kind: Kind::Event,
            operation: Operation::Insert,
            resource: "default/event/x".into(),
            content: content.into(),
        };
        Change::Put { seq, item }
    }

    #[test]
    fn rows_come_back_in_order_and_as_they_were_written() {
        let connection = Connection::open_in_memory().expect("a database");
        connection.execute_batch(TABLE).expect("a table");
        for change in [put(9, "{}"), put(2, "\"ä\""), put(9, "[1]"), put(5, "null")] {
            apply(&connection, &change).expect("written");
        }
        apply(&connection, &Change::Remove { seq: 5 }).expect("removed");
        connection
            .execute("INSERT INTO outbox VALUES (7, 'k', 'of the future', 'insert', 'r', '1')", [])
            .expect("written");
        let rows = read_all(&connection).expect("readable");
        let short: Vec<_> = rows.iter().map(|row| (row.seq, row.key.as_str(), row.len)).collect();
        assert_eq!(short, [(2, "k2", 4), (9, "k9", 3)]);
        assert_eq!((rows[0].kind, rows[0].operation), (Kind::Event, Operation::Insert));
        assert_eq!(read_content(&connection, 9).expect("readable").as_deref(), Some("[1]"));
        assert_eq!(read_content(&connection, 5).expect("readable"), None);
    }
}
