import re
s=open('/work/main/control-plane/src/usage/report.rs').read()
i=s.index('r#"select r.* from')
j=s.index('order by r."place!"',i); j=s.index('"#',j)
q=s[i:j].replace('r#"','').replace('"# + $of + ','user_id = w.who').replace('"#','')
q=re.sub(r'--.*','',q); q=' '.join(q.split())
import sys
n=int(sys.argv[1])
users=','.join("md5('u%d')::uuid"%k for k in range(7,7+n))
q=q.replace('$1',':ctx').replace('$2::uuid[]','array[%s]'%users).replace('$3::timestamptz[]',"array_fill(now()-interval '20 days', array[%d])"%n).replace('$4::timestamptz[]','array_fill(now(), array[%d])'%n)
open('/tmp/pb/x/ub%d.sql'%n,'w').write("select public.ctx('00000000-0000-0000-0000-000000000001') as ctx \\gset\n"+q+';\n')
